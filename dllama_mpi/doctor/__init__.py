"""What a cluster's hosts are like, asked before a job is started: reaching them, a probe that runs there, comparing."""
