export async function demo(..._args: unknown[]): Promise<void> {}
