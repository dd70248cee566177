"""What compare.py is made of: models -> plan -> runs -> records -> report, plots."""
