"""Where evidence comes from: one interface (`base.Platform`), one back end for each way to get a quote."""
