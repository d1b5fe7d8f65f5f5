"""Figures of the pages, as the JSON files beside the benchmarks give them: sentences and rows of tables."""
