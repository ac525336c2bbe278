"""Four questions, each a registry of functions: how: granularity, where: context, what: criterion, when: schedule."""
