"""One loader per model family, and the embedded model's files."""
