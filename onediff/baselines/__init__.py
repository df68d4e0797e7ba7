"""Systems that OneDiff is compared with: chat models that read two images, and a Siamese CNN trained by this project."""
