"""The planner: counts, memory, speed and cost of a run on paper."""
