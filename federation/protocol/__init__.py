"""What device and hub say to each other, and how it is carried: letters, topics, bytes, effects.

Nothing here knows torch, and only `mqtt` knows paho.
"""
