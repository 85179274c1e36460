pytest_plugins = ["tests.brokers", "tests.command_line", "tests.databases"]
