"""What a stage minimises. Objectives give sums, and how many things they sum: parts of a batch add up."""
