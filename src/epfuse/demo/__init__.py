"""The main job: a MiniMax-M3 text model with every MoE layer's experts on expert-parallel ranks, against itself."""
