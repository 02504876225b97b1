"""A grid of configs: trained and evaluated point by point, then one table and its plots."""
