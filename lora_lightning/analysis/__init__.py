"""The rank that an adapter uses: section 7 of the paper (arXiv 2106.09685) for any adapter, ours or PEFT's."""
