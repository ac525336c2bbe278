"""The four questions, a registry of functions for each: how (granularity), where (context), what (criterion), when (schedule)."""
