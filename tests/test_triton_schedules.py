"""What the launch tables return, for every width: blocks that a program can hold, and grids that cover their work."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from gcng.kernels import (
    edge_hidden,
    edge_moments,
    edge_prologue,
    edge_wide_rows,
    gates,
    logit_gradients,
    messages,
    pair_storage,
    pair_tiles,
    synthesis,
    synthesis_geometry,
)
from gcng.kernels.launch import recorded_launches

WIDTHS = (1, 2, 3, 16, 64, 100, 128, 384, 512, 1000, 1024, 5000, 2**17)
# Tables for passes that do not mix channels, or walk along rows: a block is at most this many channels wide.
TABLES = {
    "gates": (gates.gates_schedule, 64),
    "messages": (messages.messages_schedule, 64),
    "moments": (edge_moments.moments_schedule, 64),
    "storage": (pair_storage.storage_schedule, 64),
    "columns": (edge_prologue.columns_schedule, 64),
    "hidden": (edge_hidden.hidden_schedule, 1024),
    "hidden backward": (edge_hidden.hidden_backward_schedule, 128),
}


def is_power_of_two(number: int) -> bool:
    return number >= 1 and number & (number - 1) == 0


def assert_fits(rows: int, channels: int, warps: int, width: int, widest: int) -> None:
    """Powers of two, no more than 32 elements a thread, and no wider than the rows need."""
    assert all(map(is_power_of_two, (rows, channels, warps)))
    assert warps <= 32 and rows * channels <= min(4096, 32 * 32 * warps)
    assert channels <= widest and (channels >= widest or width <= channels < max(2, 2 * width))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", TABLES)
def test_blocks_of_pairs_fit(name: str, width: int) -> None:
    table, widest = TABLES[name]
    schedule = table(width)
    assert_fits(schedule.block_j, schedule.block_d, schedule.num_warps, width, widest)
    assert 1 <= schedule.steps <= 8 and schedule == table(width)


@pytest.mark.parametrize("width", WIDTHS)
def test_blocks_of_parts_and_of_wide_rows_fit(width: int) -> None:
    with recorded_launches(90) as recording:
        total = torch.empty(3, width, device="meta")
        pair_tiles.add_parts(torch.empty(2, 3, 40, width, device="meta"), [total, total])
    (started,) = recording.launches
    schedule = started.schedule
    assert_fits(schedule.block_j, schedule.block_d, schedule.num_warps, width, 64)
    assert started.grid[0] * schedule.block_d >= 3 * width and started.grid[1] == 2
    with recorded_launches(90) as recording:
        pair_tiles.add_parts(torch.empty(2, 1, 2048, width, device="meta"), [total[:1], total[1:2]])
    kernels = [one.kernel.fn.__name__ for one in recording.launches]
    # Sums over all pairs of a large tile, of which there are few: in two steps, the first by many programs.
    assert kernels == ["sum_parts_kernel"] * (width < 16_384) + ["add_parts_kernel"]
    assert recording.launches[0].grid[0] >= 32 * (width < 16_384)
    if width <= 1024:  # the widest rows that have a product with partial statistics
        schedule = edge_wide_rows.normalize_schedule(width)
        assert_fits(schedule.block_j, schedule.block_d, schedule.num_warps, width, 1024)
        assert schedule.block_d >= width


@pytest.mark.parametrize("programs", (1, 24, 256, 1023, 1024, 10_000))
@pytest.mark.parametrize("rows", (0, 1, 7, 8, 9, 64, 80, 1000))
def test_chunks_of_rows_cover_a_tile_once(rows: int, programs: int) -> None:
    chunk, chunks = pair_tiles.row_chunks(rows, programs)
    assert chunks >= 1 and chunk * chunks >= rows > chunk * (chunks - 1) - (rows == 0)
    assert chunks == 1 if programs >= pair_tiles.MANY_PROGRAMS or rows <= pair_tiles.LEAST_ROWS else chunks > 1
    assert (chunks - 1) * programs < pair_tiles.MANY_PROGRAMS


@pytest.mark.parametrize("width", WIDTHS)
def test_blocks_of_the_synthesis_fit(width: int) -> None:
    distance = synthesis_geometry.distance_tile(width)
    sizes = [value for name, value in vars(distance).items() if name.startswith("block")]
    assert all(map(is_power_of_two, sizes)) and torch.Size(sizes).numel() <= 4096
    for most in range(71):
        for dtype, channels in ((torch.float32, 256), (torch.float64, 128)):
            tile = synthesis.synthesis_tile(most, width, dtype)
            sizes = tile.block_g, tile.block_a, tile.block_d
            assert all(map(is_power_of_two, sizes)) and torch.Size(sizes).numel() <= 4096
            # Fewer than the largest class has are walked through; more would be masked in every class.
            assert min(most, 8) <= tile.block_g < max(2, 2 * most) and tile.block_a * tile.block_g == 8
            assert 16 <= tile.block_d <= channels and (tile.block_d == channels or tile.block_d < max(32, 2 * width))


@pytest.mark.parametrize("length", (1, 2, 7, 40, 527, 528, 529, 5000, 2**20))
def test_spans_cover_a_walk_once(length: int) -> None:
    for others in (1, 2, 3, 64, 527, 528, 529, 10**6):
        count, per_span = synthesis.spans(length, others)
        assert count * per_span >= length > (count - 1) * per_span
        # Programs enough to fill a GPU, and no more parts than that takes.
        assert count <= -(-synthesis.PROGRAMS // others)
    assert synthesis.spans(0, 1)[0] == 0


@pytest.mark.parametrize(("anchors", "classes", "width"), ((1, 1, 1), (37, 5, 384), (80, 40, 512), (8192, 4096, 1024)))
def test_walks_over_classes_cover_anchors_and_channels(anchors: int, classes: int, width: int) -> None:
    class Block:
        shape, z = (anchors, classes, 2 * classes), torch.empty(anchors, width, device="meta")

    tile = synthesis.synthesis_tile(2, width, torch.float32)
    (anchor_blocks, count, channel_blocks), per_span = synthesis.walk_over_classes(Block, tile)
    assert anchor_blocks * tile.block_a >= anchors > (anchor_blocks - 1) * tile.block_a
    assert channel_blocks * tile.block_d >= width > (channel_blocks - 1) * tile.block_d
    assert count * per_span >= classes > (count - 1) * per_span
    assert anchor_blocks < 2**31 and max(count, channel_blocks) <= 65535


@pytest.mark.parametrize("steps", (1, 2, 3, 100, 4097))
def test_splits_of_a_gradient_cover_its_steps_once(steps: int) -> None:
    for blocks in (1, 4, 131, 132, 133, 10**5):
        for programs in (132, 264):
            count, per_split = logit_gradients._splits(blocks, steps, programs)
            assert count * per_split >= steps > (count - 1) * per_split
            assert count == 1 or count * blocks <= 2 * programs
