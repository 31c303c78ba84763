"""Extractors: the shipped ones, building by name, freezing, and parameters per part."""

from __future__ import annotations

import copy
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from gcng.models import (
    EmbeddingTable,
    LinearExtractor,
    SmallConvNet,
    build_extractor,
    check_extractor,
    find_head,
    freeze_backbone,
    freeze_batch_norm,
    freeze_named,
    make_head,
    replace_head,
    split_parameters,
)
from gcng.models.factory import AverageMaxPool

# Shipped extractors ---------------------------------------------------------------------------------------


def test_the_small_network_has_the_documented_size_and_shape() -> None:
    network = SmallConvNet(64)
    assert sum(parameter.numel() for parameter in network.parameters()) == 172_768
    assert network(torch.rand(5, 1, 32, 32)).shape == (5, 64)
    assert SmallConvNet(7, in_channels=3, channels=(4, 5, 6))(torch.rand(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (33, 47), (64, 64), (105, 105)])
def test_the_small_network_takes_other_sizes(size: tuple[int, int]) -> None:
    assert SmallConvNet(16)(torch.rand(2, 1, *size)).shape == (2, 16)


def test_the_small_network_sees_where_ink_lies() -> None:
    network = SmallConvNet(16).eval()
    left, right = torch.zeros(2, 1, 1, 32, 32)
    left[..., 12:20, 4:12] = 1
    right[..., 12:20, 20:28] = 1
    assert not torch.allclose(network(left), network(right), atol=1e-3)


def test_the_small_network_learns_a_batch_by_heart() -> None:
    images = torch.rand(12, 1, 32, 32)
    labels = torch.arange(12)
    network = SmallConvNet(12)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(12):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1  # log(12) = 2.5 at the start


def test_initial_weights_follow_the_seed() -> None:
    torch.manual_seed(1)
    first = SmallConvNet(8)
    torch.manual_seed(1)
    again, other = SmallConvNet(8), SmallConvNet(8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 7, 32), (1, 32, 32)])
def test_the_small_network_refuses_other_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \(N, 1, H, W\) with H and W at least 8, got"):
        SmallConvNet(8)(torch.rand(shape))


def test_the_linear_extractor_is_a_matrix() -> None:
    extractor = LinearExtractor(3, 8, bias=False)
    inputs = torch.rand(4, 2, 4)
    assert torch.allclose(extractor(inputs), inputs.flatten(1) @ extractor.head.weight.T)
    with pytest.raises(ValueError, match=r"inputs have 9 numbers per sample \(shape \(4, 9\)\), expected 8"):
        extractor(torch.rand(4, 9))


def test_the_table_gives_and_trains_its_rows() -> None:
    table = EmbeddingTable(4, 10, scale=0.5)
    out = table(torch.tensor([3, 3, 9]))
    assert torch.equal(out, table.table.weight[[3, 3, 9]])
    out.sum().backward()
    assert table.table.weight.grad[3].tolist() == [2.0] * 4
    assert table.table.weight.grad[0].tolist() == [0.0] * 4
    torch.manual_seed(2)
    whole = EmbeddingTable(4, 10).table.weight
    torch.manual_seed(2)
    assert torch.equal(EmbeddingTable(4, 10, scale=0.5).table.weight, whole * 0.5)
    with pytest.raises(
        ValueError, match=r"indices must be integers of shape \(N,\), got torch.float32 \(2,\)"
    ):
        table(torch.zeros(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SmallConvNet(0), "SmallConvNet: embedding_size must be an integer of at least 1, got 0"),
        (lambda: SmallConvNet(8, in_channels=1.5), "in_channels must be an integer of at least 1, got 1.5"),
        (lambda: SmallConvNet(8, channels=(1, 2)), r"channels must hold 3 numbers, got \(1, 2\)"),
        (lambda: LinearExtractor(8, -1), "in_features must be an integer of at least 1, got -1"),
        (lambda: EmbeddingTable(8, True), "num_samples must be an integer of at least 1, got True"),
    ],
)
def test_bad_sizes_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Building by name -----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """The outer parts of a torchvision ResNet."""

    def __init__(self, weights: str | None = None, width: int = 6) -> None:
        super().__init__()
        self.weights = weights
        self.conv1 = nn.Conv2d(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.bn1(self.conv1(images))).flatten(1))


class Inception(Residual):
    """A model with auxiliary classifiers, as torchvision's GoogLeNet."""

    def __init__(
        self, weights: str | None = None, aux_logits: bool = True, init_weights: bool | None = None
    ) -> None:
        super().__init__(weights)
        if weights is not None and (not aux_logits or init_weights):
            raise ValueError("The parameter 'aux_logits' expected value True but got False instead.")
        self.aux_logits, self.init_weights = aux_logits, init_weights
        self.aux1 = self.aux2 = nn.Linear(2, 2) if aux_logits else None


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A torchvision of two models, in place of the real one, which has no build for every torch."""
    package, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    known = {"resnet50": Residual, "googlenet": Inception}
    models.list_models = lambda: sorted(known)
    models.get_model = lambda name, **options: known[name](**options)
    package.models = models
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    return package


def test_shipped_extractors_are_built_by_name() -> None:
    network = build_extractor("small_conv", 24, in_channels=2)
    assert isinstance(network, SmallConvNet)
    check_extractor(network, torch.rand(3, 2, 32, 32), 24)
    assert isinstance(build_extractor("linear", 4, in_features=9), LinearExtractor)


def test_torchvision_models_get_an_embedding_layer(torchvision: ModuleType) -> None:
    model = build_extractor("torchvision:resnet50", 16, weights="DEFAULT", width=5)
    assert model.weights == "DEFAULT"
    assert (model.fc.in_features, model.fc.out_features) == (5, 16)
    check_extractor(model, torch.rand(2, 3, 8, 8), 16)
    assert find_head(model) is model.fc


def test_the_published_head_and_pooling(torchvision: ModuleType) -> None:
    model = build_extractor("torchvision:resnet50", 16, head="norm_linear", pooling="average_max")
    assert [type(part) for part in model.fc] == [nn.BatchNorm1d, nn.Linear]
    assert isinstance(model.avgpool, AverageMaxPool)
    check_extractor(model, torch.rand(2, 3, 8, 8), 16)
    backbone, head = split_parameters(model)
    assert len(head) == 4
    assert {id(p) for p in head} == {id(p) for p in model.fc.parameters()}
    assert len(backbone) == 4


def test_auxiliary_classifiers_are_left_out(torchvision: ModuleType) -> None:
    plain = build_extractor("torchvision:googlenet", 16)
    assert (plain.aux_logits, plain.init_weights, plain.aux1) == (False, True, None)
    for options in ({}, {"aux_logits": False}):
        loaded = build_extractor("torchvision:googlenet", 16, weights="DEFAULT", **options)
        assert (loaded.aux_logits, loaded.init_weights, loaded.aux1, loaded.aux2) == (False, None, None, None)
    kept = build_extractor("torchvision:googlenet", 16, weights="DEFAULT", aux_logits=True)
    assert kept.aux_logits and kept.aux1 is not None


def test_unknown_torchvision_models_and_options_are_refused(torchvision: ModuleType) -> None:
    with pytest.raises(
        ValueError, match="torchvision has no model 'resnet51'; torchvision.models.list_models"
    ):
        build_extractor("torchvision:resnet51", 16)
    with pytest.raises(ValueError, match="head must be one of linear, norm_linear, got 'mlp'"):
        build_extractor("torchvision:resnet50", 16, head="mlp")
    with pytest.raises(ValueError, match="pooling must be one of average, average_max, got 'max'"):
        build_extractor("torchvision:resnet50", 16, pooling="max")


def test_pooling_needs_a_pooling_layer(torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.models, "get_model", lambda name: nn.Linear(3, 4))
    with pytest.raises(ValueError, match="torchvision:resnet50 has no avgpool layer; use pooling='average'"):
        build_extractor("torchvision:resnet50", 16, pooling="average_max")


def test_timm_models_get_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    class Features(nn.Module):
        num_features = 12

        def __init__(self, num_classes: int, pretrained: bool) -> None:
            super().__init__()
            self.patch_embed = nn.Linear(4, 12)
            self.arguments = num_classes, pretrained

        def forward(self, inputs: Tensor) -> Tensor:
            return self.patch_embed(inputs)

    timm = ModuleType("timm")
    timm.is_model = lambda name: name == "vit_small"
    timm.create_model = lambda name, num_classes, pretrained=False: Features(num_classes, pretrained)
    monkeypatch.setitem(sys.modules, "timm", timm)
    model = build_extractor("timm:vit_small.dino", 5, pretrained=True)
    assert model.backbone.arguments == (0, True)
    check_extractor(model, torch.rand(2, 4), 5)
    frozen = freeze_named(model, "patch_embed")
    assert [p.requires_grad for p in model.backbone.parameters()] == [False, False]
    frozen.release()
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="timm has no model 'vit_tiny'"):
        build_extractor("timm:vit_tiny", 5)


@pytest.mark.parametrize(("spec", "package"), [("torchvision:resnet50", "torchvision"), ("timm:vit", "timm")])
def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch, spec: str, package: str) -> None:
    for module in (package, f"{package}.models"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ModuleNotFoundError, match=f"{spec} needs {package}.*: pip install {package} .* your own model"
    ):
        build_extractor(spec, 16)


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("user_models")
    module.tiny = lambda embedding_size, depth=1: nn.Sequential(*[nn.Linear(3, embedding_size)] * depth)
    module.Net = LinearExtractor
    module.wrong = lambda embedding_size: "model"
    module.number = 3
    module.Space = type(
        "Space", (), {"make": staticmethod(lambda embedding_size: nn.Linear(2, embedding_size))}
    )
    monkeypatch.setitem(sys.modules, "user_models", module)
    return module


def test_callables_are_built_by_import_path(user_module: ModuleType) -> None:
    assert build_extractor("user_models:tiny", 7)(torch.rand(2, 3)).shape == (2, 7)
    assert isinstance(build_extractor("user_models:Net", 7, in_features=3), LinearExtractor)
    assert build_extractor("user_models:Space.make", 7).out_features == 7


@pytest.mark.parametrize(
    ("spec", "options", "error", "message"),
    [
        ("user_models:absent", {}, ValueError, "user_models has no 'absent'"),
        ("user_models:number", {}, TypeError, "is int, which cannot be called"),
        ("user_models:wrong", {}, TypeError, "returned str; expected an nn.Module"),
        (
            "user_models:tiny",
            {"width": 3},
            TypeError,
            r"unexpected keyword argument 'width'. Its signature is \(emb",
        ),
        (
            "absent_models:tiny",
            {},
            ModuleNotFoundError,
            "cannot import 'absent_models' .*, or put its folder on PYTHON",
        ),
        (
            "small_conv",
            {"depth": 3},
            TypeError,
            "'small_conv' is called as .*unexpected keyword argument 'depth'",
        ),
        (
            "resnet50",
            {},
            ValueError,
            'unknown spec \'resnet50\'; use "small_conv", "linear", "torchvision:<name>"',
        ),
        ("user_models:", {}, ValueError, "unknown spec 'user_models:'"),
    ],
)
def test_bad_specs_are_refused(
    user_module: ModuleType, spec: str, options: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        build_extractor(spec, 16, **options)


def test_an_import_error_inside_the_users_module_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    (tmp_path / "broken_models.py").write_text("import package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="^No module named 'package_that_is_not_there'$"):
        build_extractor("broken_models:net", 16)


def test_a_module_is_no_spec_and_sizes_are_checked() -> None:
    with pytest.raises(TypeError, match="spec must be text, .* got Linear; an nn.Module needs no building"):
        build_extractor(nn.Linear(2, 2), 16)
    with pytest.raises(ValueError, match="embedding_size must be an integer of at least 1, got 0"):
        build_extractor("small_conv", 0)


def test_the_head_is_replaced_where_it_is_nested() -> None:
    model = nn.Module()
    model.features = nn.Linear(3, 3)
    model.classifier = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 1000))
    layer = replace_head(model, 4)
    assert model.classifier[2] is layer
    assert (layer.in_features, layer.out_features) == (9, 4)
    assert model.features.out_features == 3
    odd = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    assert replace_head(odd, 2) is odd[0]
    with pytest.raises(ValueError, match="Sequential has no nn.Linear to replace"):
        replace_head(nn.Sequential(nn.ReLU()), 2)


def test_average_max_pooling_adds_both() -> None:
    features = torch.rand(2, 3, 4, 5)
    expected = features.flatten(2).mean(2) + features.flatten(2).max(2).values
    assert torch.allclose(AverageMaxPool()(features)[..., 0, 0], expected)


@pytest.mark.parametrize(
    ("extractor", "error", "message"),
    [
        (nn.Flatten(0), ValueError, r"Flatten turned 2 inputs into \(12,\); expected \(2, 5\)"),
        (nn.Identity(), ValueError, r"turned 2 inputs into \(2, 6\); expected \(2, 5\)"),
        (nn.LSTM(6, 5), TypeError, r"LSTM returned tuple; expected one float tensor \(N, D\)"),
    ],
)
def test_extractors_of_another_shape_are_refused(extractor: nn.Module, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        check_extractor(extractor, torch.rand(2, 6), 5)


def test_checking_an_extractor_leaves_it_as_it_was() -> None:
    network = SmallConvNet(4).train()
    before = copy.deepcopy(network.state_dict())
    check_extractor(network, torch.rand(2, 1, 32, 32), 4)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        network.head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="returned values that are not finite"):
        check_extractor(network, torch.rand(2, 1, 32, 32), 4)


# Freezing -------------------------------------------------------------------------------------------------


def test_parameters_are_split_without_loss_or_overlap() -> None:
    network = SmallConvNet(8)
    backbone, head = split_parameters(network)
    assert [id(p) for p in backbone + head] == [id(p) for p in network.parameters()]
    assert {id(p) for p in head} == {id(network.head.weight), id(network.head.bias)}
    backbone, head = split_parameters(network, head=network.backbone)
    assert len(backbone) == 2
    with pytest.raises(ValueError, match=r"head \(Linear\) is not part of the extractor \(SmallConvNet\)"):
        split_parameters(network, head=nn.Linear(2, 2))


def test_the_head_is_found() -> None:
    network = SmallConvNet(8)
    assert find_head(network) is network.head
    plain = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
    assert find_head(plain) is plain[2]
    without = nn.Sequential(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="Sequential has no attribute head, fc, classifier and no nn.Linear"):
        find_head(without)


def test_warm_up_trains_the_head_only_and_ends() -> None:
    network = SmallConvNet(8)
    network.backbone[0].weight.requires_grad_(False)  # the user's own choice
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    network(torch.rand(4, 1, 32, 32)).sum().backward()  # gradients from before the warm-up

    def changed() -> set[str]:
        before = {name: value.clone() for name, value in network.named_parameters()}
        network(torch.rand(4, 1, 32, 32)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}

    with freeze_backbone(network) as frozen:
        assert changed() == {"head.weight", "head.bias"}
        assert changed() == {"head.weight", "head.bias"}
    assert frozen.parameters == []
    assert not network.backbone[0].weight.requires_grad
    after = changed()
    assert {"backbone.4.weight", "head.weight"} <= after
    assert "backbone.0.weight" not in after
    frozen.release()  # again: nothing more


def test_frozen_batch_norm_keeps_its_statistics() -> None:
    network = SmallConvNet(8).train()
    assert freeze_batch_norm(network) == 3
    before = copy.deepcopy(network.state_dict())
    network(torch.rand(4, 1, 32, 32)).sum().backward()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    assert network.backbone[1].weight.grad is None
    assert network.backbone[0].weight.grad is not None
    network.train()  # documented: thaws the mode, so that it is called once per epoch
    assert network.backbone[1].training
    fresh = SmallConvNet(8)
    freeze_batch_norm(fresh, affine=False)
    assert fresh.backbone[1].weight.requires_grad
    assert freeze_batch_norm(nn.Linear(2, 2)) == 0


def test_an_unknown_part_cannot_be_frozen() -> None:
    with pytest.raises(
        ValueError, match="no parameter with 'patch_embed' in its name; its parts are backbone, head"
    ):
        freeze_named(SmallConvNet(8), "patch_embed")


def test_heads_by_kind() -> None:
    assert isinstance(make_head(3, 4), nn.Linear)
    with pytest.raises(ValueError, match="head must be one of linear, norm_linear, got 'deep'"):
        make_head(3, 4, "deep")


@pytest.mark.parametrize("training", [True, False])
def test_check_extractor_keeps_the_mode_of_every_part(training: bool) -> None:
    network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)))
    network.train(training)
    network[1].eval()
    network[2].train()
    before = [module.training for module in network.modules()]
    check_extractor(network, torch.rand(2, 6), 5)
    assert [module.training for module in network.modules()] == before
