"""What watches a run: W0's guard, guards of gradients, figures of steps, samples, the export at the end, the report."""
