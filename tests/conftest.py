pytest_plugins = ["tests.brokers", "tests.databases"]
