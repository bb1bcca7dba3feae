"""Where a step's time goes: from a profiler's trace to phases, layers, gaps and expert bandwidth."""
