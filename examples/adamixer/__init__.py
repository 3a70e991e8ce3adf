"""AdaMixer, a query-based object detector, whose decoder becomes a third as large by LORS.

- Gao, Wang, Han, Guo: "AdaMixer: A Fast-Converging Query-Based Object Detector", CVPR 2022,
  arXiv 2203.16507
- Li et al.: "LORS: Low-rank Residual Structure for Parameter-Efficient Network Stacking",
  CVPR 2024, arXiv 2403.04303
"""
