"""The original Ali-CCP files for `prepare_ctr`."""
