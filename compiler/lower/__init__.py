"""Lowering: from the fused graph to the plan and the weights of each rank."""
