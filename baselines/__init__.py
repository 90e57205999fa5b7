"""Competing methods and the plain alternatives: one short file each, naming its schedule, site and predictor."""
