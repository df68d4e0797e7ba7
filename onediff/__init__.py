"""OneDiff: two images in, what changed in words out."""
