"""Batch norm, SE, add and ReLU in four passes over memory: eleven reads and writes of full size, not 27 to 29."""
