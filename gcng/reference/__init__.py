from gcng.reference.correlation import center_normalize
