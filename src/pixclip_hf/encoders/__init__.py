"""One way to embed regions, whole images and texts, for CLOC, PixCLIP and any CLIP or SigLIP."""
