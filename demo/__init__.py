"""The demo: plain N-pair and GCA-HNG trained beside each other on rendered letters; `python -m demo`."""
