"""Model families, one record in each file (see `family.py`); the loader of pipelines; the embedded models' files."""
