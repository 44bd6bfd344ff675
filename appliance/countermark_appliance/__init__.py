"""The appliance: what runs inside the TD."""
