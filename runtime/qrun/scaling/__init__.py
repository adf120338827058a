"""A batch on the workers of a Ray cluster: Ray reads, hands out, retries and writes; the answers are ours."""
