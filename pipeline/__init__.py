"""A model split over workers: partitions, and their forward and backward as one step."""
