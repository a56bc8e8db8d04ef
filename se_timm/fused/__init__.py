"""Batch norm, SE, add and ReLU in four passes over memory instead of twenty-seven."""
