"""Systems that every table sets beside OneDiff: chat models that read two images, and a Siamese CNN trained here."""
