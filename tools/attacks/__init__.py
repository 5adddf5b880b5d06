"""What is done to the library, kind by kind: `tools/campaign.py` runs it and counts."""
