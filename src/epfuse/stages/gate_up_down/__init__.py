"""Both GEMMs in one launch: gate_up, then down."""
