"""The built-in advantage estimators, one file each: NAME, NEEDS_GROUPS, AGGREGATION and advantages(inputs)."""
