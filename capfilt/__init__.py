"""capfilt turns a noisy pile of web image-text pairs into a clean, captioned training set."""

__version__ = "0.1.0"
