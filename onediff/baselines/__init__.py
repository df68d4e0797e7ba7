"""Systems that OneDiff is compared with: chat models that read two images, and a small Siamese CNN."""
