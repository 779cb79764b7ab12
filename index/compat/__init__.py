"""Asking old rows with a new model (BT², Zhou et al., ICCV 2023): a head is fitted to pairs, an index carried over."""
