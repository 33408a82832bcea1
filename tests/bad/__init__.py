"""Generators of broken and hostile inputs, for the tests beside and for ``scripts/campaign_fuzz.py``."""
