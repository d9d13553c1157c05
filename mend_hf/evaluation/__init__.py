"""Measuring what a prefix keeps of in-context learning, and what it costs."""
