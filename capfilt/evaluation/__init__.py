"""Metrics of retrieval, captions and filtering."""
