"""Attention for NVIDIA Hopper (SM90) in Triton Gluon: TMA, wgmma and warp specialisation, from Python."""
