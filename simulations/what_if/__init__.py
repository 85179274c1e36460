"""What if: the hub's own round engine on a virtual clock, with twins in the devices' place."""
