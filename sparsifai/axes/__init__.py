"""Four questions and a registry of functions for each.

How: granularities. Where: contexts. What: criteria, computed from quantities. When: schedules.
"""
