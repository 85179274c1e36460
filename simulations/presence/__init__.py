"""Who is there, and until when: devices that come and go by themselves."""
