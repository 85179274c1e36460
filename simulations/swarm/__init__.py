"""Real agents' state machines over real MQTT, by the thousand, from one process."""
