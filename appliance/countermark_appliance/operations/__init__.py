"""What an operator sees and limits while a node serves: metrics, traces, logs, keys with quotas. Never a prompt."""
