"""Four questions and a registry of functions for each.

How: granularities. Where: contexts. What: criteria, computed from quantities. When: schedules.

The modules that hold values of a registry are imported here, before any other module of this folder.
"""

from . import budget, context, criterion, data_criteria, gates, granularity, grouping, quantity, schedule  # noqa: F401
