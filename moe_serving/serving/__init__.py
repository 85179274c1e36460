"""The ways in: HTTP, MQTT, and what is counted of both."""
