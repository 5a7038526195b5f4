"""Click and conversion ranking: MMoE over an ESMM funnel, with an auxiliary focal loss on CTCVR."""
