export async function show(..._args: unknown[]): Promise<void> {}
